# Everything of medpretrain, on a base that has torch for its GPUs.
#   docker build -f docker/train.Dockerfile -t medpretrain-train .
# Any base with Python 3.11 to 3.13, pip and apt: its torch (2.11 or later), torchvision and CUDA stay; without torch, the
# locked one is installed.
ARG BASE=pytorch/pytorch:2.11.0-cuda13.0-cudnn9-runtime

FROM ${BASE}
ARG BASE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="medpretrain-train" \
      org.opencontainers.image.description="Large-scale pretraining for medical images" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"
USER root
# DeepSpeed and torch.compile compile at run time: C++, and Python's headers where the base's Python came without.
# Launchers call `python`, which not every base has.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends g++ \
       $(python3 -c 'import os, sysconfig; os.path.exists(sysconfig.get_path("include") + "/Python.h") or print("python3-dev")') \
    && rm -rf /var/lib/apt/lists/* \
    && (command -v python || ln -s "$(command -v python3)" /usr/local/bin/python)
COPY . /tmp/install/
# s3: checkpoints on S3; tensorboard: event files
ARG EXTRAS=train
# A base's own PIP_CONSTRAINT (NVIDIA's has one) would speak against the lock. DeepSpeed comes as source and wants torch
# to be there; it compiles its operators when they are first used.
RUN export DS_BUILD_OPS=0 PIP_CONSTRAINT= PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore \
    && python3 /tmp/install/docker/constraints.py /tmp/install/requirements.lock > /tmp/constraints.txt \
    && python3 -m pip install --constraint /tmp/constraints.txt torch torchvision setuptools wheel ninja \
    && python3 -m pip install --constraint /tmp/constraints.txt --no-build-isolation "/tmp/install${EXTRAS:+[${EXTRAS}]}" \
    && rm -r /tmp/install /tmp/constraints.txt
# HOME is given because `--user 4242` has no entry in passwd, and is open to all because its files must go somewhere;
# USER because torch.compile asks for a name. TORCH_EXTENSIONS_DIR stays ~/.cache/torch_extensions: Apptainer puts the
# user's own home there, and makes all of the image read-only.
ENV PYTHONUNBUFFERED=1 \
    HOME=/home/medpretrain \
    USER=medpretrain \
    MEDPRETRAIN_REVISION=${REVISION}
# A number that no base uses: 1000 is `ubuntu` in some. A label that lies about the version fails here.
RUN useradd --uid 10001 --user-group --create-home --shell /bin/bash medpretrain \
    && mkdir /work && chmod 1777 /work /home/medpretrain \
    && python -c 'import sys, medpretrain as m; m.__version__ == sys.argv[1] or sys.exit(f"VERSION={m.__version__}, not {sys.argv[1]}")' \
       "${VERSION}"
WORKDIR /work
USER 10001:10001
ENTRYPOINT ["medpretrain"]
CMD ["--help"]
