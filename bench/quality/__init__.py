"""What rounding and few evaluations do to codes and words."""
