"""Image formation of single-particle cryo-EM: pure functions of tensors, with batch dimensions."""
