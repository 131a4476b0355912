"""Modules that fill Brevitas' injector slots: they convert values <-> codes."""
