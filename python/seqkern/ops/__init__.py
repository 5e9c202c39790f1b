"""The operators seen by torch's dispatcher: schemas, shapes, gradients, and the choice of a backend."""
