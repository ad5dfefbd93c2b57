-- From version 3 to 4: accounts are listed newest first, and a key of the issuer
-- has its effect in one account.
CREATE INDEX IF NOT EXISTS accounts_by_time ON accounts (created_at, id, name);
CREATE TABLE IF NOT EXISTS issuer_keys (
    idempotency_key TEXT COLLATE "C" NOT NULL PRIMARY KEY CHECK (length(idempotency_key) = 65),
    account_id      TEXT COLLATE "C" NOT NULL
);
