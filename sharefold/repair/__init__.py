"""What is mended after conversion, without labels: coefficients, BatchNorms, the classifier, and refinement by distillation."""
