"""Typed settings: the dataclasses (``schema``) and how files become them (``io``)."""
