"""What a reconstruction is worth: alignment first, then pose errors, Fourier shell correlation and coverage."""
