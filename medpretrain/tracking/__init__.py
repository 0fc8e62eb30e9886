"""What a run tells the world: metrics.jsonl first; MLflow and TensorBoard follow it; where the run came from."""
