-- From version 3 of the tables to version 4. Once released, it never changes again.
--
-- Accounts are listed newest first, the movements of all accounts are found by their time, and a key
-- of the issuer has its effect in one account. Those of before are noted, but for those of batches
-- over several accounts: which was the first of these is not known, so such a key is noted once it
-- comes again.
CREATE INDEX IF NOT EXISTS accounts_by_time ON accounts (created_at, id, name COLLATE "C");
CREATE INDEX IF NOT EXISTS transactions_by_time ON transactions (created_at, sequence)
    WHERE type NOT IN ('hold', 'release');
CREATE TABLE IF NOT EXISTS issuer_keys (
    idempotency_key TEXT COLLATE "C" NOT NULL PRIMARY KEY CHECK (length(idempotency_key) = 65),
    account_id      TEXT COLLATE "C" NOT NULL
);
INSERT INTO issuer_keys SELECT idempotency_key, min(account_id) FROM transactions
    WHERE length(idempotency_key) = 65 AND substr(idempotency_key, 1, 1) = '§'
        AND type <> 'transfer_in'
    GROUP BY idempotency_key HAVING count(*) = 1;
