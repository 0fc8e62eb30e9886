"""What a training step sees: order, views, pipeline, batches."""
