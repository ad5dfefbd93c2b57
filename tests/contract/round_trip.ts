// A round trip with the types that openapi-typescript makes of the contract. It is run with the
// address of a wallet, and of one of a later version: see tests/test_contract.py.

import createClient from "openapi-fetch";
import type { components, paths } from "./contract.js";

declare const process: { argv: string[]; exitCode: number };

type Transaction = components["schemas"]["Transaction"];

function equal(found: unknown, wanted: unknown): void {
  const [one, other] = [JSON.stringify(found), JSON.stringify(wanted)];
  if (one !== other) throw new Error(`${one} is not ${other}`);
}

async function connect(baseUrl: string) {
  const made = await createClient<paths>({ baseUrl }).POST("/api/register", {
    body: { name: "Ada" },
  });
  if (!made.data) throw new Error(made.error.code);
  return createClient<paths>({
    baseUrl,
    headers: { Authorization: `Bearer ${made.data.token}` },
  });
}

async function goRound(url: string): Promise<void> {
  const client = await connect(url);
  const send = () =>
    client.POST("/api/transactions/topup", {
      params: { header: { "Idempotency-Key": "order-17" } },
      body: { amount: 1250, description: "Order 17" },
    });
  const [first, again] = [await send(), await send()];
  equal(first.data, again.data);
  equal(again.response.headers.get("Idempotent-Replayed"), "true");

  const spent = await client.POST("/api/transactions/charge", {
    body: { amount: 250, metadata: { shop: "12" } },
  });
  if (!spent.data) throw new Error(spent.error.code);
  const { type, balance, description, metadata } = spent.data;
  equal([type, balance, description, metadata], ["charge", 1000, null, { shop: "12" }]);

  const refused = await client.POST("/api/transactions/charge", { body: { amount: 2000 } });
  equal([refused.response.status, refused.error?.code], [402, "insufficient_funds"]);
  equal([refused.error?.available, refused.error?.required], [1000, 2000]);

  const seen: Transaction[] = [];
  let cursor: string | undefined;
  do {
    const page = await client.GET("/api/transactions", {
      params: { query: { limit: 1, cursor } },
    });
    if (!page.data) throw new Error(page.error.code);
    seen.push(...page.data.transactions);
    cursor = page.data.next_cursor ?? undefined;
  } while (cursor);
  equal(seen.map((one) => one.id), [spent.data.id, first.data?.id]);

  const held = await client.POST("/api/holds", { body: { amount: 400, expires_in_s: 60 } });
  if (!held.data) throw new Error(held.error.code);
  const active = await client.GET("/api/holds", { params: { query: { status: "active" } } });
  equal(active.data?.holds.map((one) => one.id), [held.data.id]);
  const captured = await client.POST("/api/holds/{id}/capture", {
    params: { path: { id: held.data.id } },
    body: { amount: 300 },
  });
  equal([captured.data?.reference, captured.data?.balance], [held.data.id, 700]);

  const account = (await client.GET("/api/account")).data;
  equal([account?.balance, account?.available, account?.holds_active], [700, 700, 0]);
  const then = await client.GET("/api/account/balance", {
    params: { query: { at: "2000-01-01T00:00:00Z" } },
  });
  equal(then.data?.balance, 0);
}

// Members, values and a code that came after these types were made.
async function readLaterVersion(url: string): Promise<void> {
  const client = await connect(url);
  const body = { amount: 5, description: "of a later version" };
  const made = await client.POST("/api/transactions/topup", { body });
  const type: string | undefined = made.data?.type;
  equal([type, made.data && "since_then" in made.data], ["interest", true]);
  const held = await client.POST("/api/holds", { body: { ...body, amount: 1 } });
  equal(held.data?.status, "pending");
  const refused = await client.POST("/api/transactions/charge", { body: { amount: 1e9 } });
  const code: string | undefined = refused.error?.code;
  equal([refused.response.status, code], [402, "spending_limit_exceeded"]);
}

await goRound(process.argv[2]!);
await goRound(process.argv[3]!);
await readLaterVersion(process.argv[3]!);
console.log("went round");
