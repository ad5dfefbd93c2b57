// A round trip with the client that openapi-generator makes of the contract: see round_trip.ts.

import { AccountsApi, Configuration, HoldsApi, ResponseError, TransactionsApi } from "./client/index.js";

declare const process: { argv: string[] };

function equal(found: unknown, wanted: unknown): void {
  const [one, other] = [JSON.stringify(found), JSON.stringify(wanted)];
  if (one !== other) throw new Error(`${one} is not ${other}`);
}

async function connect(basePath: string): Promise<Configuration> {
  const open = new AccountsApi(new Configuration({ basePath }));
  const { token } = await open.register({ registration: { name: "Ada" } });
  return new Configuration({ basePath, accessToken: token });
}

async function refusal(asked: Promise<unknown>): Promise<[number, any]> {
  try {
    await asked;
  } catch (error) {
    if (error instanceof ResponseError) return [error.response.status, await error.response.json()];
    throw error;
  }
  throw new Error("It was not refused.");
}

async function goRound(url: string): Promise<void> {
  const configuration = await connect(url);
  const transactions = new TransactionsApi(configuration);
  const holds = new HoldsApi(configuration);
  const order = { movement: { amount: 1250, description: "Order 17" }, idempotencyKey: "order-17" };
  const [first, again] = [await transactions.topup(order), await transactions.topup(order)];
  equal(first, again);
  const spent = await transactions.charge({ movement: { amount: 250, metadata: { shop: "12" } } });
  equal([spent.type, spent.balance, spent.metadata], ["charge", 1000, { shop: "12" }]);
  const [status, problem] = await refusal(transactions.charge({ movement: { amount: 2000 } }));
  equal([status, problem.code, problem.required], [402, "insufficient_funds", 2000]);
  const page = await transactions.listTransactions({ limit: 1 });
  const last = await transactions.listTransactions({ limit: 1, cursor: page.nextCursor! });
  equal([last.transactions.map((one) => one.id), last.nextCursor], [[first.id], null]);
  const held = await holds.hold({ newHold: { amount: 400, expiresInS: 60 } });
  equal((await holds.listHolds({ status: "active" })).holds[0]?.id, held.id);
  const captured = await holds.capture({ id: held.id, part: { amount: 300 } });
  equal([captured.reference, captured.balance], [held.id, 700]);
  const accounts = new AccountsApi(configuration);
  equal((await accounts.getBalance({ at: new Date(0) })).balance, 0);
}

async function readLaterVersion(url: string): Promise<void> {
  const configuration = await connect(url);
  const transactions = new TransactionsApi(configuration);
  const movement = { amount: 5, description: "of a later version" };
  equal((await transactions.topup({ movement })).type, "interest");
  const held = await new HoldsApi(configuration).hold({ newHold: { ...movement, amount: 1 } });
  equal(held.status, "pending");
  const [status, problem] = await refusal(transactions.charge({ movement: { amount: 1e9 } }));
  equal([status, problem.code], [402, "spending_limit_exceeded"]);
}

await goRound(process.argv[2]!);
await goRound(process.argv[3]!);
await readLaterVersion(process.argv[3]!);
console.log("went round");
