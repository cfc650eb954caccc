"use strict";
// Pointer and keyboard on head maps. The facts about a head are read from its row of the table below the maps.
const tip = document.getElementById("tip"), said = document.getElementById("said");
const maps = [...document.querySelectorAll("svg.map")];
const cellsOf = (map) => map.querySelector(".cells").querySelectorAll(":scope > rect");
const KINDS = { q: "query head", k: "KV head" };

function rowOf(map, index) {
  const heads = Number(map.dataset.heads);
  return document.getElementById(`${map.dataset.rows}${Math.floor(index / heads)}-${index % heads}`);
}

function textOf(map, index) {
  const row = rowOf(map, index);
  if (!row) return "";
  const names = [...row.closest("table").tHead.rows[0].cells].map((cell) => cell.textContent);
  const values = [...row.cells].map((cell) => cell.textContent);
  const [layer, head] = values[0].split(".");
  const lines = values.slice(1).map((value, i) => `${names[i + 1]}: ${value}`);
  return [`layer ${layer}, ${KINDS[map.dataset.rows]} ${head}`, ...lines].join("\n");
}

let anchor = null;

function place() {
  const box = anchor.getBoundingClientRect(), { width, height } = tip.getBoundingClientRect();
  const left = Math.min(box.left + box.width / 2 - width / 2, document.documentElement.clientWidth - width - 8);
  const above = box.top - height - 10;
  tip.style.left = `${Math.max(left, 8)}px`;
  tip.style.top = `${above > 4 ? above : box.bottom + 10}px`;
}

function show(text, element, aloud) {
  tip.textContent = text;
  tip.hidden = !text;
  anchor = element;
  if (aloud) said.textContent = text;
  place();
}

function hide() {
  tip.hidden = true;
  document.querySelectorAll(".here").forEach((cell) => cell.classList.remove("here"));
}

function choose(map, index, aloud) {
  hide();
  if (!cellsOf(map)[index]) return;
  map.dataset.at = index;
  for (const other of maps) if (other.dataset.rows === map.dataset.rows) cellsOf(other)[index]?.classList.add("here");
  show(textOf(map, index), cellsOf(map)[index], aloud);
}

for (const map of maps) {
  const cells = [...cellsOf(map)], heads = Number(map.dataset.heads);
  const steps = { ArrowRight: heads, ArrowLeft: -heads, ArrowDown: 1, ArrowUp: -1 };
  const pointed = (event) => {
    const index = cells.indexOf(event.target);
    if (index >= 0) choose(map, index, false);
  };
  map.addEventListener("pointerover", pointed);
  map.addEventListener("click", pointed);
  map.addEventListener("pointerleave", hide);
  map.addEventListener("focus", () => { if (map.matches(":focus-visible")) choose(map, Number(map.dataset.at ?? 0), true); });
  map.addEventListener("blur", hide);
  map.addEventListener("keydown", (event) => {
    const at = Number(map.dataset.at ?? 0), step = steps[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const sameLayer = Math.abs(step) !== 1 || Math.floor(at / heads) === Math.floor((at + step) / heads);
    if (cells[at + step] && sameLayer) choose(map, at + step, true);
  });
}

document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
document.addEventListener("scroll", () => { if (!tip.hidden) place(); }, { passive: true, capture: true });

// A link to #head-q3-4 shows layer 3, query head 4.
function fromAddress() {
  const place = /^#head-([qk])(\d+)-(\d+)$/.exec(location.hash);
  const map = place && maps.find((one) => one.dataset.rows === place[1]);
  if (!map || Number(place[3]) >= Number(map.dataset.heads)) return;
  map.scrollIntoView({ block: "center", behavior: "instant" });
  choose(map, Number(place[2]) * Number(map.dataset.heads) + Number(place[3]), true);
}
window.addEventListener("hashchange", fromAddress);
fromAddress();
