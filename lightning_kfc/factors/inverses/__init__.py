"""The damped inverses, a file a kind; :mod:`lightning_kfc.factors.inverse` names them all."""
