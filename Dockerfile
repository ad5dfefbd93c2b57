# The digest fixes every byte of the base, on each processor. To renew it, take a newer tag, and the
# digest that this prints for it: docker buildx imagetools inspect python:3.13.16-slim-trixie
FROM python:3.13.16-slim-trixie@sha256:70729b46c69b4f1e97c4822c1af3df53a1476cf5ddc6c087c0c10bc3a5678c2f

# The user has no rights but on /data, where the database lives.
RUN groupadd --system --gid 10001 wallet \
    && useradd --system --uid 10001 --gid wallet --no-create-home wallet \
    && install --directory --owner wallet --group wallet --mode 0700 /data

WORKDIR /app
COPY requirements-image.txt .
RUN pip install --no-cache-dir --no-compile --require-hashes -r requirements-image.txt
COPY wallet*.py ./
COPY schema.sql checks.sql openapi.json openapi.yaml docs.html wallet.html ./
COPY migrations/ migrations/

# As a number, by which Kubernetes sees that it is not root.
USER 10001:10001
VOLUME /data
EXPOSE 4000
ENV WALLET_HOST=0.0.0.0 \
    WALLET_DSN=sqlite:////data/wallet.db \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# Without a shell, and without a proxy, which urllib would ask where HTTP_PROXY names one. A
# WALLET_PORT that is no number is Kubernetes's, and then the port is 4000.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5s CMD ["python", "-c", \
    "import os, sys, http.client as http; \
    host = os.environ.get('WALLET_HOST', '127.0.0.1'); \
    host = {'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host); \
    port = os.environ.get('WALLET_PORT', '4000'); \
    asked = http.HTTPConnection(host, int(port) if port.isdecimal() else 4000, timeout=4); \
    asked.request('GET', '/readyz'); \
    status = asked.getresponse().status; \
    sys.exit(0 if status == 200 else f'/readyz is answered with {status}')"]

# Python is process 1 and gets SIGTERM itself.
CMD ["python", "wallet.py"]
