"""What makes a model faster on a CPU: weights in packed forms, and a flow head that computes no row twice."""
