-- The tables of a wallet, for SQLite and for Postgres alike.
--
-- Statements end with a semicolon, and no semicolon stands anywhere else, so
-- that the file can be split at them. Every key begins with the account id, so
-- that a sharding database keeps an account's rows together, but for the
-- issuer's keys, which are looked at for none of an account. Amounts are whole
-- minor units of the wallet's currency (1250 is $12.50), and times are whole
-- microseconds since 1970-01-01T00:00:00Z. The CHECKs repeat what wallet.py
-- enforces, so that no other program can break a promise either.
--
-- Text that programs compare is COLLATE "C", in the order of its bytes: what
-- language a database is in, and a new version of that language's rules, must
-- not decide which keys are equal. SQLite has that order anyway, and no such
-- name for it, so there the wallet leaves the name out.

-- One row: what this database is. It is read before anything else is made. The
-- digits are the currency's decimals: with 2, an amount of 1250 is 12.50.
CREATE TABLE IF NOT EXISTS wallet (
    id              INTEGER          PRIMARY KEY CHECK (id = 1),
    schema_version  INTEGER          NOT NULL CHECK (schema_version >= 1),
    currency        TEXT COLLATE "C" NOT NULL CHECK (length(currency) = 3),
    currency_digits INTEGER          NOT NULL CHECK (currency_digits BETWEEN 0 AND 9)
);

-- One row per account. Its balance is that of its last transaction, and held
-- is the sum of its active holds, kept here so that a charge can be refused by
-- one conditional UPDATE. last_sequence counts its transactions. updated_at is
-- the account's clock, which never goes back, and frozen is 0 or 1. Of the
-- token, only the SHA-256 is kept, in hex.
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

-- Accounts are listed newest first, and a part of a name is looked for here,
-- without the accounts.
CREATE INDEX IF NOT EXISTS accounts_by_time ON accounts (created_at, id, name COLLATE "C");

-- One row per movement of money, and per hold that was made or released: all
-- that has an idempotency key. Written once and never changed. The sequence
-- counts 1, 2, 3 ... within the account, without gaps. balance is the
-- account's after this movement, which a hold and a release leave as it is. The
-- metadata is a JSON object of strings. The reference is the id of the charge
-- that is refunded, of the hold that is captured or released, or of the other
-- account of a transfer. The idempotency key is the client's or one made for
-- the request, and the fingerprint is the SHA-256 of the request, in hex, so
-- that a key sent again with another request is noticed, or zeros for a request
-- without a key, which cannot be sent again.
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

-- History of one type costs no more than history of all types, however rare
-- the type is in the account.
CREATE INDEX IF NOT EXISTS transactions_by_type ON transactions (account_id, type, sequence);

-- The newest movements of all accounts, and how many an hour had, are found
-- without the rest. A hold and a release are none.
CREATE INDEX IF NOT EXISTS transactions_by_time ON transactions (created_at, sequence)
    WHERE type NOT IN ('hold', 'release');

-- What a charge has had refunded is the sum of a few rows.
CREATE INDEX IF NOT EXISTS refunds_by_charge ON transactions (account_id, reference)
    WHERE type = 'refund';

-- One row per hold, under the sequence number of the transaction that made it.
-- The status changes once, when the hold ends: captured, in whole or in part,
-- released, or expired. One that is past its time counts as expired, though it
-- may stay active here until its account next makes a hold or needs the money.
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

-- What is active is found without what is over.
CREATE INDEX IF NOT EXISTS active_holds ON holds (account_id, expires_at) WHERE status = 'active';

-- One row per idempotency key with which the issuer had an effect: in which
-- account that was, so that the key has none in another. It stands here in the
-- form in which transactions has it, where no account can send it.
CREATE TABLE IF NOT EXISTS issuer_keys (
    idempotency_key TEXT COLLATE "C" NOT NULL PRIMARY KEY CHECK (length(idempotency_key) = 65),
    account_id      TEXT COLLATE "C" NOT NULL
);
