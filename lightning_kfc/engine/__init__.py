"""What the steps of :class:`~lightning_kfc.KFC` are made of; the only room that imports several stages."""
