"""What is measured before any method runs: images and their parts, input moments, sensitivities, the problem of a group."""
