"""Makes trainer-VERSION.json.gz out of the published models, where kubeflow-trainer-api is installed."""

from __future__ import annotations

import gzip
import json
from importlib.metadata import version
from pathlib import Path

KINDS = (
    "TrainerV1alpha1TrainJob",
    "TrainerV1alpha1ClusterTrainingRuntime",
    "JobsetV1alpha2JobSet",
    "IoK8sApiBatchV1JobSpec",
    "IoK8sApiCoreV1ConfigMap",
)

# Their classes hold a value of one of two types; the published OpenAPI has the types.
EITHER = {
    "IoK8sApimachineryPkgApiResourceQuantity": ["string", "number"],
    "IoK8sApimachineryPkgUtilIntstrIntOrString": ["string", "integer"],
}


def main() -> None:
    import kubeflow_trainer_api.models as models
    from pydantic.json_schema import models_json_schema

    _, schema = models_json_schema([(getattr(models, kind), "validation") for kind in KINDS], by_alias=True)
    for name, types in EITHER.items():
        schema["$defs"][name] = {"description": schema["$defs"][name]["description"], "type": types}
    text = json.dumps(schema, sort_keys=True)
    file = Path(__file__).parent / f"trainer-{version('kubeflow-trainer-api')}.json.gz"
    file.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
