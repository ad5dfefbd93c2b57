-- The tables of version 1, as it made them.
CREATE TABLE IF NOT EXISTS wallet (
    id             INTEGER PRIMARY KEY CHECK (id = 1),
    schema_version INTEGER NOT NULL CHECK (schema_version >= 1),
    currency       TEXT    NOT NULL CHECK (length(currency) = 3)
);
CREATE TABLE IF NOT EXISTS accounts (
    id             TEXT    NOT NULL PRIMARY KEY,
    name           TEXT    NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    token_hash     TEXT    NOT NULL CHECK (length(token_hash) = 64),
    balance        BIGINT  NOT NULL CHECK (balance BETWEEN 0 AND 9007199254740991),
    last_sequence  BIGINT  NOT NULL CHECK (last_sequence >= 0),
    created_at     BIGINT  NOT NULL
);
CREATE TABLE IF NOT EXISTS transactions (
    account_id      TEXT   NOT NULL REFERENCES accounts (id),
    sequence        BIGINT NOT NULL CHECK (sequence >= 1),
    type            TEXT   NOT NULL CHECK (type IN ('topup', 'charge')),
    amount          BIGINT NOT NULL CHECK (amount BETWEEN 1 AND 9007199254740991),
    balance         BIGINT NOT NULL CHECK (balance BETWEEN 0 AND 9007199254740991),
    description     TEXT   CHECK (length(description) <= 500),
    idempotency_key TEXT   NOT NULL CHECK (length(idempotency_key) BETWEEN 1 AND 255),
    fingerprint     TEXT   NOT NULL CHECK (length(fingerprint) = 64),
    created_at      BIGINT NOT NULL,
    PRIMARY KEY (account_id, sequence),
    UNIQUE (account_id, idempotency_key)
);
CREATE INDEX IF NOT EXISTS transactions_by_type ON transactions (account_id, type, sequence);
