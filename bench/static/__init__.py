"""What needs no GPU and no clock: machine code, counted bytes and launches, predictions."""
