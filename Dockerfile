FROM python:3.13-slim

# The user has no rights but on /data, where the database lives.
RUN useradd --system --uid 10001 --no-create-home wallet \
    && install --directory --owner wallet --mode 0700 /data

WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir --no-compile -r requirements.txt
COPY wallet.py wallet_cli.py wallet_metrics.py wallet_postgres.py wallet_server.py ./
COPY schema.sql checks.sql openapi.yaml wallet.html ./
COPY migrations/ migrations/

USER wallet
VOLUME /data
EXPOSE 4000
ENV WALLET_HOST=0.0.0.0 \
    WALLET_DSN=sqlite:////data/wallet.db \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

HEALTHCHECK --interval=10s --timeout=5s --start-period=5s CMD ["python", "-c", \
    "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ.get(\"WALLET_PORT\", 4000)}/readyz', timeout=4)"]

# Python is process 1 and gets SIGTERM itself.
CMD ["python", "wallet.py"]
