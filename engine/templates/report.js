"use strict";
(() => {
  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const find = document.getElementById("find");
  const tools = document.querySelector(".tools");
  const shown = document.getElementById("shown");
  tools.hidden = false;
  tools.addEventListener("submit", (event) => event.preventDefault());

  // Find and filter.
  const texts = new Map(rows.map((row) => [row, row.querySelector("th").textContent.toLowerCase()]));
  const filter = () => {
    const wanted = find.value.trim().toLowerCase();
    const status = tools.elements.status.value;
    let count = 0;
    for (const row of rows) {
      row.hidden = !(texts.get(row).includes(wanted) && (!status || row.dataset.status === status));
      count += !row.hidden;
    }
    shown.textContent = count === rows.length ? "" : `${count} of ${rows.length} shown`;
  };
  tools.addEventListener("input", filter);
  // A link to a row shows it, whatever the filter says.
  for (const link of document.querySelectorAll(".failures a")) {
    link.addEventListener("click", () => {
      tools.reset();
      filter();
    });
  }

  // Sort. What is unknown stays last.
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  const value = (row, column, kind) => {
    const cell = row.cells[column];
    if (kind === "text") return cell.firstChild.textContent;
    return cell.dataset.v === "" ? null : Number(cell.dataset.v);
  };
  const sort = (header, column) => {
    const descending = header.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const kind = header.dataset.sort;
    const keyed = rows.map((row) => [value(row, column, kind), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      const order = kind === "text" ? compare(a, b) : a - b;
      return descending ? -order : order;
    });
    body.append(...keyed.map(([, row]) => row));
  };
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    if (!header.dataset.sort) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    header.replaceChildren(button);
    button.addEventListener("click", () => sort(header, column));
  });

  // Pictures: arrow keys go through the rows as they stand; Escape closes.
  const viewer = document.getElementById("viewer");
  const picture = viewer.querySelector("img");
  const title = document.getElementById("viewer-title");
  let current = null;
  const show = (button) => {
    current = button;
    picture.src = button.firstChild.src;
    title.textContent = button.closest("tr").querySelector("th").firstChild.textContent;
    picture.alt = `Slide ${title.textContent} with its tissue outline and patches`;
    if (!viewer.open) viewer.showModal();
  };
  const step = (by) => {
    const buttons = [...body.querySelectorAll("tr:not([hidden]) .picture button")];
    const next = buttons[buttons.indexOf(current) + by];
    if (next) show(next);
  };
  body.addEventListener("click", (event) => {
    const button = event.target.closest(".picture button");
    if (button) show(button);
  });
  viewer.addEventListener("click", (event) => {
    const by = event.target.dataset.step;
    if (event.target === viewer || by === "0") viewer.close();
    else if (by) step(Number(by));
  });
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  viewer.addEventListener("close", () => current.focus());
})();
