-- From version 2 of the tables to version 3. Once released, it never changes again.
--
-- The currency's decimals are those of ISO 4217, as of 2026-01-01. A unit of one's own, which had
-- 2 where it was shown, has 2.
ALTER TABLE wallet RENAME TO wallet_2;
CREATE TABLE wallet (
    id              INTEGER          PRIMARY KEY CHECK (id = 1),
    schema_version  INTEGER          NOT NULL CHECK (schema_version >= 1),
    currency        TEXT COLLATE "C" NOT NULL CHECK (length(currency) = 3),
    currency_digits INTEGER          NOT NULL CHECK (currency_digits BETWEEN 0 AND 9)
);
INSERT INTO wallet SELECT id, schema_version, currency, CASE
    WHEN currency IN ('BIF', 'CLP', 'DJF', 'GNF', 'ISK', 'JPY', 'KMF', 'KRW', 'PYG', 'RWF', 'UGX',
        'UYI', 'VND', 'VUV', 'XAF', 'XOF', 'XPF') THEN 0
    WHEN currency IN ('BHD', 'IQD', 'JOD', 'KWD', 'LYD', 'OMR', 'TND') THEN 3
    WHEN currency IN ('CLF', 'UYW') THEN 4
    ELSE 2 END FROM wallet_2;
DROP TABLE wallet_2;
-- Only Postgres has and needs these. Each makes the indexes again, in the order of bytes.
ALTER TABLE accounts
    ALTER COLUMN id TYPE TEXT COLLATE "C",
    ALTER COLUMN token_hash TYPE TEXT COLLATE "C";
ALTER TABLE transactions
    ALTER COLUMN account_id TYPE TEXT COLLATE "C",
    ALTER COLUMN type TYPE TEXT COLLATE "C",
    ALTER COLUMN reference TYPE TEXT COLLATE "C",
    ALTER COLUMN idempotency_key TYPE TEXT COLLATE "C",
    ALTER COLUMN fingerprint TYPE TEXT COLLATE "C";
ALTER TABLE holds
    ALTER COLUMN account_id TYPE TEXT COLLATE "C",
    ALTER COLUMN status TYPE TEXT COLLATE "C"
