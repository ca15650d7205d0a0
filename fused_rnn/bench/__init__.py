"""fused_rnn against torch.nn, on named shapes: `python -m fused_rnn.bench --help`."""
