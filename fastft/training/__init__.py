"""The whole job around the kernels: data, tokens, Trainer, metrics, the folder that is left behind."""
