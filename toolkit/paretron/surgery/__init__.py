"""A checkpoint through slices to a smaller one, tensor by tensor, never as a model in memory."""
