-- What must be so in a wallet, and for each a statement that finds the rows
-- where it is not: the table, the account, the sequence and what is wrong with
-- it. Where all is well, none finds any. See schema.sql for what a row means.
--
-- Statements end with a semicolon, and no semicolon stands anywhere else, so
-- that the file can be split at them. As each sees one moment, all may run while
-- the wallet serves, on SQLite and on Postgres. The question marks come in pairs,
-- for the accounts to look at: those whose id is above the first and not above
-- the second. To run a statement by hand, write '' and 'z' in their places, which
-- is all accounts.

-- An entry follows the one before it, and its amount is what changed the
-- balance.
WITH entries AS (
    SELECT account_id, sequence, amount, balance, created_at, lag(sequence) OVER earlier AS last_sequence,
           lag(created_at) OVER earlier AS last_created_at, coalesce(lag(balance) OVER earlier, 0) + CASE
               WHEN type IN ('topup', 'refund', 'transfer_in') THEN amount
               WHEN type IN ('charge', 'transfer_out') THEN -amount
               ELSE 0 END AS expected
    FROM transactions WHERE account_id > ? AND account_id <= ?
    WINDOW earlier AS (PARTITION BY account_id ORDER BY sequence)
), found AS (
    SELECT 'transactions' AS table_name, account_id, sequence, CASE
               WHEN sequence < 1 OR amount NOT BETWEEN 1 AND 9007199254740991 THEN 'a number is out of its bounds'
               WHEN sequence <> coalesce(last_sequence, 0) + 1 THEN 'the entry before it is missing'
               WHEN balance <> expected THEN 'the balance is ' || balance || ', and should be ' || expected
               WHEN balance NOT BETWEEN 0 AND 9007199254740991 THEN 'a number is out of its bounds'
               WHEN created_at < last_created_at THEN 'its time is before that of the entry before it'
               END AS wrong
    FROM entries
)
SELECT * FROM found WHERE wrong IS NOT NULL ORDER BY account_id, sequence;

-- An entry is of an account.
SELECT 'transactions' AS table_name, account_id, sequence, 'its account is missing' AS wrong
FROM transactions
WHERE account_id > ? AND account_id <= ? AND sequence = 1
    AND NOT EXISTS (SELECT 1 FROM accounts WHERE id = account_id)
ORDER BY account_id, sequence;

-- An account is what its last entry and its active holds say.
WITH kept AS (
    SELECT id, balance, held, last_sequence, updated_at,
           coalesce((SELECT max(sequence) FROM transactions WHERE account_id = id), 0) AS entries,
           coalesce((SELECT balance FROM transactions WHERE account_id = id ORDER BY sequence DESC LIMIT 1), 0) AS total,
           coalesce((SELECT sum(amount) FROM holds WHERE account_id = id AND status = 'active'), 0) AS active
    FROM accounts WHERE id > ? AND id <= ?
), found AS (
    SELECT 'accounts' AS table_name, id AS account_id, CAST(NULL AS BIGINT) AS sequence, CASE
               WHEN last_sequence <> entries
                   THEN 'last_sequence is ' || last_sequence || ', and should be ' || entries
               WHEN balance <> total THEN 'the balance is ' || balance || ', and should be ' || total
               WHEN held <> active THEN 'held is ' || held || ', and should be ' || active
               WHEN held > balance THEN 'more is held than there is'
               WHEN updated_at NOT BETWEEN 0 AND 253402300799999999 THEN 'its clock is out of its bounds'
               END AS wrong
    FROM kept
)
SELECT * FROM found WHERE wrong IS NOT NULL ORDER BY account_id;

-- A hold is made by one entry, ended by at most one, and is what these say.
-- What is missing of it is NULL: amount is that of its row, and made, charged
-- and released are what its entries have.
WITH events AS (
    SELECT account_id, 'hld_' || substr(account_id, 5) || '_' || sequence AS hold, sequence,
           'row' AS type, amount, status, captured
    FROM holds WHERE account_id > ? AND account_id <= ?
    UNION ALL
    SELECT account_id, CASE type
               WHEN 'hold' THEN 'hld_' || substr(account_id, 5) || '_' || sequence
               ELSE coalesce(reference, '') END,
           sequence, type, amount, NULL, NULL
    FROM transactions
    WHERE account_id > ? AND account_id <= ?
        AND (type IN ('hold', 'release') OR type = 'charge' AND reference IS NOT NULL)
), merged AS (
    SELECT account_id, max(status) AS status, max(captured) AS captured,
           coalesce(min(CASE WHEN type IN ('row', 'hold') THEN sequence END), min(sequence)) AS sequence,
           sum(CASE type WHEN 'row' THEN amount END) AS amount,
           sum(CASE type WHEN 'hold' THEN amount END) AS made,
           sum(CASE type WHEN 'charge' THEN amount END) AS charged,
           sum(CASE type WHEN 'release' THEN amount END) AS released,
           count(CASE WHEN type IN ('charge', 'release') THEN 1 END) AS ends,
           coalesce(max(CASE type WHEN 'charge' THEN 'captured' WHEN 'release' THEN 'released' END),
                    max(CASE status WHEN 'expired' THEN 'expired' END), 'active') AS expected
    FROM events GROUP BY account_id, hold
), found AS (
    SELECT CASE WHEN amount IS NULL THEN 'transactions' ELSE 'holds' END AS table_name, account_id, sequence, CASE
               WHEN amount IS NULL AND made IS NULL THEN 'the hold that it ends is missing'
               WHEN amount IS NULL THEN 'its row in holds is missing'
               WHEN made IS NULL THEN 'the entry that made it is missing'
               WHEN amount <> made THEN 'the amount is ' || amount || ', and should be ' || made
               WHEN ends > 1 THEN 'it has ended ' || ends || ' times'
               WHEN released <> amount THEN 'the amount is ' || amount || ', and that of its release ' || released
               WHEN captured <> coalesce(charged, 0)
                   THEN 'captured is ' || captured || ', and should be ' || coalesce(charged, 0)
               WHEN charged > amount THEN 'more is captured than was held'
               WHEN status <> expected THEN 'the status is ' || status || ', and should be ' || expected
               END AS wrong
    FROM merged
)
SELECT * FROM found WHERE wrong IS NOT NULL ORDER BY account_id, sequence;

-- Refunds are of a charge of the same account, and do not exceed it together.
-- The charge is named by its id, txn_, 16 characters and the sequence.
WITH refunds AS (
    SELECT account_id, reference, max(sequence) AS sequence, sum(amount) AS refunded, CASE
               WHEN length(reference) BETWEEN 22 AND 39 AND ltrim(substr(reference, 22), '0123456789') = ''
                   THEN CAST(substr(reference, 22) AS BIGINT) END AS charge
    FROM transactions WHERE account_id > ? AND account_id <= ? AND type = 'refund'
    GROUP BY account_id, reference
), found AS (
    SELECT 'transactions' AS table_name, refunds.account_id, refunds.sequence, CASE
               WHEN amount IS NULL THEN 'the charge that it refunds is missing'
               WHEN refunded > amount
                   THEN 'with it, ' || refunded || ' is refunded of a charge of ' || amount
               END AS wrong
    FROM refunds
        LEFT JOIN transactions AS charges
        ON charges.account_id = refunds.account_id AND charges.sequence = charge AND charges.type = 'charge'
            AND refunds.reference = 'txn_' || substr(charges.account_id, 5) || '_' || charge
)
SELECT * FROM found WHERE wrong IS NOT NULL ORDER BY account_id, sequence;

-- A transfer is in both accounts. (The accounts are joined so that the entries
-- are found by their type.) This looks at all accounts at once.
WITH halves AS (
    SELECT account_id AS sender, reference AS receiver, amount, 1 AS entries, sequence AS sent, NULL AS received
    FROM accounts JOIN transactions ON account_id = id AND type = 'transfer_out'
    UNION ALL
    SELECT reference, account_id, amount, -1, NULL, sequence
    FROM accounts JOIN transactions ON account_id = id AND type = 'transfer_in'
), transfers AS (
    SELECT sender, receiver, sum(entries) AS surplus, max(sent) AS sent, max(received) AS received
    FROM halves GROUP BY sender, receiver, amount
), found AS (
    SELECT 'transactions' AS table_name, CASE WHEN surplus > 0 THEN sender ELSE receiver END AS account_id,
           CASE WHEN surplus > 0 THEN sent ELSE received END AS sequence, CASE
               WHEN surplus > 0 THEN 'no transfer_in of this amount is in the other account for it'
               WHEN surplus < 0 THEN 'no transfer_out of this amount is in the other account for it'
               END AS wrong
    FROM transfers
)
SELECT * FROM found WHERE wrong IS NOT NULL ORDER BY account_id, sequence;

-- A key of the issuer is that of an entry in the account that is noted for it.
-- This looks at all accounts at once.
SELECT 'issuer_keys' AS table_name, account_id, CAST(NULL AS BIGINT) AS sequence,
       'no entry of this account has its key' AS wrong
FROM issuer_keys
WHERE NOT EXISTS (
    SELECT 1 FROM transactions
    WHERE transactions.account_id = issuer_keys.account_id
        AND transactions.idempotency_key = issuer_keys.idempotency_key)
ORDER BY account_id;
