"""voxkern: Voxtral-class speech models at the speed of the memory they stream."""
