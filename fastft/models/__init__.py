"""Our kernels in models that exist already: a module's class is changed to ours, and given back."""
