"""The parts of :class:`~lightning_kfc.KFC`; the only room that imports several stages."""
