// Builds the page into server/page/built: one document, one script, one style sheet, one icon; the same bytes each time.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync, statSync } from "node:fs";
import { join } from "node:path";
import { defineConfig } from "vite";

const SOURCES = ["index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.js", "src"];

/** Every file under a path, sorted by name. */
function files(path) {
  if (!statSync(path).isDirectory()) return [path];
  return readdirSync(path).sort().flatMap((name) => files(join(path, name)));
}

/** Writes a digest of the sources beside the build, by which a test without node sees that the build is old. */
function digestOfSources() {
  return {
    name: "digest-of-sources",
    generateBundle() {
      const digest = createHash("sha256");
      for (const file of SOURCES.flatMap(files)) {
        digest.update(`${file}\0`).update(readFileSync(file)).update("\0");
      }
      this.emitFile({ type: "asset", fileName: "sources.sha256", source: `${digest.digest("hex")}\n` });
    },
  };
}

export default defineConfig({
  base: "/",
  publicDir: false,
  plugins: [digestOfSources()],
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  build: {
    outDir: "../server/page/built",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: false,
    assetsInlineLimit: 0,
    cssCodeSplit: false,
    rollupOptions: {
      output: {
        entryFileNames: "assets/page-[hash].js",
        chunkFileNames: "assets/part-[hash].js",
        assetFileNames: "assets/[name]-[hash][extname]",
      },
    },
  },
});
