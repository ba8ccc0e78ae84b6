FROM python:3.13-slim

WORKDIR /srv/reprise
ENV PYTHONUNBUFFERED=1

# Packages first: this layer is rebuilt only when the lock changes. The lock names everything, so pip resolves nothing.
COPY requirements.lock ./
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements.lock

COPY migrations ./migrations
COPY app ./app
RUN python -m compileall -q app migrations

# The data directory holds the secret key; the servers' own data are in their own containers.
RUN useradd --system --uid 10001 --user-group reprise \
    && install --directory --owner=reprise --group=reprise --mode=0700 /var/lib/reprise
ENV REPRISE_DATA_DIR=/var/lib/reprise
VOLUME /var/lib/reprise
USER reprise

EXPOSE 8000
ENTRYPOINT ["python", "-m", "app"]
CMD ["serve"]
