// The values under the pointer. Without this script the page shows the same figures, only not their numbers.
"use strict";
(() => {
  const page = JSON.parse(document.getElementById("curves").textContent);
  const tip = document.body.appendChild(document.createElement("div"));
  tip.className = "tip";
  tip.hidden = true;

  const lastAtMost = (values, wanted) => {
    let low = 0, high = values.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (values[middle] <= wanted) low = middle; else high = middle - 1;
    }
    return low;
  };

  // The mean over an arm's runs that reached that point, or null.
  const valueAt = (arm, axis, x, key) => {
    const values = arm.runs
      .filter((run) => run[axis].length && x <= run[axis][run[axis].length - 1] * 1.01)
      .map((run) => run[key][lastAtMost(run[axis], x)])
      .filter((value) => value !== null);
    return values.length ? values.reduce((a, b) => a + b) / values.length : null;
  };

  const digits = (value) => value.toLocaleString("en", { maximumSignificantDigits: 4 });
  const percent = (value) => (100 * value).toFixed(1) + "%";
  const shown = {
    loss: (arm, axis, x) => {
      const val = valueAt(arm, axis, x, "val"), train = valueAt(arm, axis, x, "train");
      return [val !== null && `validation ${val.toFixed(4)}`, train !== null && `training ${train.toFixed(3)}`];
    },
    saved: (arm, axis, x) => {
      const saved = valueAt(arm, axis, x, "saved"), blocks = valueAt(arm, axis, x, "blocks");
      return [saved !== null && `saved ${percent(saved)}`, blocks !== null && `blocks ${percent(blocks)}`];
    },
  };

  const line = (text, colour) => {
    const row = tip.appendChild(document.createElement("div"));
    if (colour) row.appendChild(document.createElement("i")).style.background = colour;
    row.append(text);
    return row;
  };

  const describe = (plot, x) => {
    const axis = plot.dataset.axis;
    tip.replaceChildren();
    line(`${plot.dataset.title}: ${axis === "steps" && page.whole_steps ? Math.round(x) : digits(x)}`).style.fontWeight = 600;
    for (const arm of page.arms) {
      const values = shown[plot.dataset.hover](arm, axis, x).filter(Boolean).join(" · ");
      const stage = valueAt(arm, axis, x, "stage");
      if (!values) continue;
      const where = stage !== null && Number.isInteger(stage) ? ` · stage ${stage}` : "";
      line((page.single ? "" : `${arm.letter}  `) + values + where, page.single ? null : `var(--series-${arm.series})`);
    }
  };

  const place = (event) => {
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${window.scrollX + Math.max(4, Math.min(event.clientX + 16, room))}px`;
    tip.style.top = `${window.scrollY + event.clientY + 18}px`;
  };

  for (const plot of document.querySelectorAll("svg[data-hover]")) {
    const [left, top, width, height] = plot.dataset.frame.split(" ").map(Number);
    const [low, high] = plot.dataset.range.split(" ").map(Number);
    const guide = plot.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "line"));
    guide.setAttribute("class", "guide");
    guide.setAttribute("y1", top);
    guide.setAttribute("y2", top + height);
    guide.style.display = "none";
    const leave = () => { tip.hidden = true; guide.style.display = "none"; };
    plot.addEventListener("pointerleave", leave);
    plot.addEventListener("pointermove", (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(plot.getScreenCTM().inverse());
      const share = (at.x - left) / width;
      if (share < 0 || share > 1 || at.y < top - 4 || at.y > top + height + 4) return leave();
      guide.setAttribute("x1", at.x);
      guide.setAttribute("x2", at.x);
      guide.style.display = "";
      tip.hidden = false;
      describe(plot, low + share * (high - low));
      place(event);
    });
  }
})();
