// Draw each chart into its place. "ast" makes Vega interpret its expressions, so that the page needs no eval.
const specs = JSON.parse(document.getElementById("charts").textContent);
const options = { mode: "vega-lite", renderer: "svg", actions: false, ast: true };
for (const place of document.querySelectorAll("[data-chart]")) {
  vegaEmbed(place, specs[place.dataset.chart], options).catch((error) => {
    place.textContent = "This chart could not be drawn: " + error.message;
    console.error(error);
  });
}
