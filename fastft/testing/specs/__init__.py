"""One module per op; each exports ``SPEC``, an :class:`fastft.testing.OpSpec`."""
