"""Modules that fill Brevitas' injector slots: values <-> codes."""
