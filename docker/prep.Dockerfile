# `medpretrain prep` for a hospital: no torch, no compiler, no root.
#   docker build -f docker/prep.Dockerfile -t medpretrain-prep .
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
WORKDIR /source
COPY requirements.lock ./
RUN python3 -m venv /build \
    && /build/bin/pip install --no-cache-dir --constraint requirements.lock setuptools \
    && python3 -m venv --without-pip /opt/medpretrain
COPY . .
# s3: OUT on S3; cluster: shards written by a Dask cluster
ARG EXTRAS=""
# The lock is a constraint, which installs nothing by itself: of it comes in what setup.cfg asks for, and no more.
RUN /build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /build/bin/pip --python /opt/medpretrain/bin/python install --no-cache-dir --constraint requirements.lock \
       "$(echo /wheels/medpretrain-*.whl)${EXTRAS:+[${EXTRAS}]}"

FROM ${BASE}
ARG BASE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="medpretrain-prep" \
      org.opencontainers.image.description="Medical images to checked, de-identified shards" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"
USER root
COPY --from=build /opt/medpretrain /opt/medpretrain
# HOME is given because `--user 4242` has no entry in passwd, and is open to all because its files must go somewhere;
# USER because getpass fails without a name.
ENV PATH=/opt/medpretrain/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    HOME=/home/medpretrain \
    USER=medpretrain
# A number that no base uses: 1000 is `ubuntu` in some. A label that lies about the version fails here.
RUN useradd --uid 10001 --user-group --create-home --shell /bin/bash medpretrain \
    && mkdir /work && chmod 1777 /work /home/medpretrain \
    && python -c 'import sys, medpretrain as m; m.__version__ == sys.argv[1] or sys.exit(f"VERSION={m.__version__}, not {sys.argv[1]}")' \
       "${VERSION}"
WORKDIR /work
USER 10001:10001
ENTRYPOINT ["medpretrain"]
CMD ["--help"]
