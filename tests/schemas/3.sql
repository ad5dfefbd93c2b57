-- The tables of version 3, as it made them.
CREATE TABLE IF NOT EXISTS wallet (
    id              INTEGER          PRIMARY KEY CHECK (id = 1),
    schema_version  INTEGER          NOT NULL CHECK (schema_version >= 1),
    currency        TEXT COLLATE "C" NOT NULL CHECK (length(currency) = 3),
    currency_digits INTEGER          NOT NULL CHECK (currency_digits BETWEEN 0 AND 9)
);
CREATE TABLE IF NOT EXISTS accounts (
    id             TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    name           TEXT             NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    token_hash     TEXT COLLATE "C" NOT NULL CHECK (length(token_hash) = 64),
    balance        BIGINT           NOT NULL CHECK (balance BETWEEN 0 AND 9007199254740991),
    held           BIGINT           NOT NULL CHECK (held BETWEEN 0 AND balance),
    last_sequence  BIGINT           NOT NULL CHECK (last_sequence >= 0),
    frozen         INTEGER          NOT NULL CHECK (frozen IN (0, 1)),
    created_at     BIGINT           NOT NULL,
    updated_at     BIGINT           NOT NULL
);
CREATE TABLE IF NOT EXISTS transactions (
    account_id      TEXT COLLATE "C" NOT NULL REFERENCES accounts (id),
    sequence        BIGINT           NOT NULL CHECK (sequence >= 1),
    type            TEXT COLLATE "C" NOT NULL CHECK (type IN (
        'topup', 'charge', 'refund', 'transfer_in', 'transfer_out', 'hold', 'release')),
    amount          BIGINT           NOT NULL CHECK (amount BETWEEN 1 AND 9007199254740991),
    balance         BIGINT           NOT NULL CHECK (balance BETWEEN 0 AND 9007199254740991),
    description     TEXT             CHECK (length(description) <= 500),
    metadata        TEXT,
    reference       TEXT COLLATE "C",
    idempotency_key TEXT COLLATE "C" NOT NULL CHECK (length(idempotency_key) BETWEEN 1 AND 255),
    fingerprint     TEXT COLLATE "C" NOT NULL CHECK (length(fingerprint) = 64),
    created_at      BIGINT           NOT NULL,
    PRIMARY KEY (account_id, sequence),
    UNIQUE (account_id, idempotency_key)
);
CREATE INDEX IF NOT EXISTS transactions_by_type ON transactions (account_id, type, sequence);
CREATE INDEX IF NOT EXISTS refunds_by_charge ON transactions (account_id, reference)
    WHERE type = 'refund';
CREATE TABLE IF NOT EXISTS holds (
    account_id TEXT COLLATE "C" NOT NULL REFERENCES accounts (id),
    sequence   BIGINT           NOT NULL CHECK (sequence >= 1),
    amount     BIGINT           NOT NULL CHECK (amount BETWEEN 1 AND 9007199254740991),
    expires_at BIGINT           NOT NULL,
    status     TEXT COLLATE "C" NOT NULL CHECK (status IN (
        'active', 'captured', 'released', 'expired')),
    captured   BIGINT           NOT NULL CHECK (captured BETWEEN 0 AND amount),
    PRIMARY KEY (account_id, sequence),
    CHECK ((status = 'captured') = (captured > 0))
);
CREATE INDEX IF NOT EXISTS active_holds ON holds (account_id, expires_at) WHERE status = 'active';
