// Keeps the page for when there is no server: the network comes first, what was kept of this build where it gives nothing.

const BUILD = "__BUILD__"; // so that a new build is kept anew
const KEPT = `${self.registration.scope} ${BUILD}`;

async function keepAll() {
  const { files } = await (await fetch("manifest.json")).json();
  const cache = await caches.open(KEPT);
  await cache.addAll(["./", "manifest.json", ...Object.keys(files)]);
}

async function dropOld() {
  const names = await caches.keys();
  const old = names.filter((name) => name.startsWith(`${self.registration.scope} `) && name !== KEPT);
  await Promise.all(old.map((name) => caches.delete(name)));
  await self.clients.claim();
}

async function answer(request) {
  try {
    return await fetch(request);
  } catch (error) {
    const kept = await (await caches.open(KEPT)).match(request, { ignoreSearch: true });
    if (kept) return kept;
    throw error;
  }
}

self.addEventListener("install", (event) => event.waitUntil(keepAll().then(() => self.skipWaiting())));
self.addEventListener("activate", (event) => event.waitUntil(dropOld()));
self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && url.startsWith(self.registration.scope)) event.respondWith(answer(event.request));
});
