// plotly's own widget, whose five megabytes are taken from the page's one copy instead of from each figure.
const copies = (globalThis.saeWorkbookPlotly ??= new Map());

function plotly(model) {
  const id = model.get("_plotly").replace("IPY_MODEL_", "");
  if (!copies.has(id)) copies.set(id, load(model, id).catch((error) => {
    copies.delete(id);  // the next figure tries again
    throw error;
  }));
  return copies.get(id);
}

async function load(model, id) {
  const holder = await model.widget_manager.get_model(id);
  const url = URL.createObjectURL(new Blob([holder.get("value")], {type: "text/javascript"}));
  try {
    return (await import(/* webpackIgnore: true */ url)).default;
  } finally {
    URL.revokeObjectURL(url);
  }
}

export default () => {
  let figure;
  return {
    async initialize(given) {
      figure = (await plotly(given.model))();
      return figure.initialize(given);
    },
    render(given) {
      return figure.render(given);
    },
  };
};
