/** Starts the page. */
import { render } from "preact";
import { App } from "./app";
import { flush, openHistory } from "./state/history";
import { watchModels } from "./state/models";
import { startSession } from "./state/session";
import { keepSettings } from "./state/settings";
import "./styles/base.css";
import "./styles/controls.css";
import "./styles/frame.css";
import "./styles/chat.css";
import "./styles/prose.css";
import "./styles/panels.css";
import "./styles/tokens.css";

startSession();
keepSettings();
watchModels();
addEventListener("pagehide", flush);
const place = document.getElementById("page");
if (place) void openHistory().then(() => render(<App />, place));
