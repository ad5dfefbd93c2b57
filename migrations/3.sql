-- From version 3 of the tables to version 4. Once released, it never changes again.
--
-- Accounts are listed newest first, and a key of the issuer has its effect in one account. Which keys
-- it has used before is not known here: one is noted once it comes again.
CREATE INDEX IF NOT EXISTS accounts_by_time ON accounts (created_at, id, name COLLATE "C");
CREATE TABLE IF NOT EXISTS issuer_keys (
    idempotency_key TEXT COLLATE "C" NOT NULL PRIMARY KEY CHECK (length(idempotency_key) = 65),
    account_id      TEXT COLLATE "C" NOT NULL
);
