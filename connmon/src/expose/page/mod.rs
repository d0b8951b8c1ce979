//! The page at `/`: a map, tables and the state of the agent, drawn in the
//! browser from `/api/v1/summary`.
//!
//! No build step, no framework, no request to any other host, nothing inline:
//! the server's Content-Security-Policy allows nothing else. Links are relative,
//! so that the page also works behind a proxy that serves it under a prefix.

use bytes::Bytes;
use connmon_http::Asset;

/// Placeholder for the telemetry path in index.html.
const TELEMETRY: &str = "{{telemetry}}";

/// Path, `Content-Type` and body of what the page loads.
const FILES: [(&str, &str, &[u8]); 4] = [
    (
        "/assets/app.js",
        "text/javascript; charset=utf-8",
        include_bytes!("app.js"),
    ),
    (
        "/assets/style.css",
        "text/css; charset=utf-8",
        include_bytes!("style.css"),
    ),
    (
        "/assets/map.svg",
        "image/svg+xml",
        include_bytes!("../../../data/worldmap.svg"),
    ),
    (
        "/assets/icon.svg",
        "image/svg+xml",
        include_bytes!("icon.svg"),
    ),
];

/// The page of one agent.
#[derive(Clone, Debug)]
pub struct Page {
    index: Bytes,
}

impl Page {
    /// The page whose links to the metrics go to `telemetry_path`.
    pub fn new(telemetry_path: &str) -> Self {
        // "./" keeps a path such as /a:b from being read as a scheme.
        let link = format!("./{}", telemetry_path.trim_start_matches('/'));
        let index = include_str!("index.html").replace(TELEMETRY, &escape(&link));
        Self {
            index: Bytes::from(index),
        }
    }

    /// The file at `path`: `/`, or one under `/assets/`.
    pub fn asset(&self, path: &str) -> Option<Asset> {
        if path == "/" {
            return Some(Asset {
                content_type: "text/html; charset=utf-8",
                body: self.index.clone(),
            });
        }
        FILES
            .iter()
            .find(|(at, _, _)| *at == path)
            .map(|(_, content_type, body)| Asset {
                content_type,
                body: Bytes::from_static(body),
            })
    }
}

/// Text → the inside of a double-quoted HTML attribute.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
        .replace('\'', "&#39;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(page: Page, path: &str) -> String {
        let asset = page.asset(path).expect("the page has this file");
        String::from_utf8(asset.body.to_vec()).unwrap()
    }

    fn index_text(telemetry_path: &str) -> String {
        text(Page::new(telemetry_path), "/")
    }

    #[test]
    fn the_page_links_to_the_telemetry_path_in_use() {
        let page = index_text("/metrics");
        assert!(page.contains(r#"<a id="metrics" href="./metrics">"#));
        assert!(!page.contains("{{"), "a placeholder is left");
        let page = index_text("/probe/a:b\"><script>");
        assert!(page.contains(r#"href="./probe/a:b&quot;&gt;&lt;script&gt;""#));
    }

    #[test]
    fn the_telemetry_path_hides_no_file_of_the_page() {
        for (path, _, _) in FILES {
            let refused = crate::config::parse::telemetry_path(path);
            assert!(
                refused.is_err(),
                "{path} may be taken by the telemetry path"
            );
        }
    }

    #[test]
    fn nothing_is_inline_and_nothing_comes_from_elsewhere() {
        let page = index_text("/metrics");
        assert!(!page.contains("<style"), "inline style");
        assert!(!page.contains("style="), "inline style attribute");
        for tag in page.split('<').map(|tag| tag.split('>').next().unwrap()) {
            assert!(!tag.contains(" on"), "inline event handler: {tag}");
        }
        for script in page.split("<script").skip(1) {
            assert!(script.starts_with(" src=\"assets/"), "inline script");
        }
        for attribute in [
            "src=\"",
            "rel=\"stylesheet\" href=\"",
            "rel=\"icon\" href=\"",
        ] {
            for rest in page.split(attribute).skip(1) {
                let target = rest.split('"').next().unwrap();
                assert!(
                    FILES.iter().any(|(path, _, _)| path[1..] == *target),
                    "{target} is not one of our files"
                );
            }
        }
        let script = text(Page::new("/metrics"), "/assets/app.js");
        for sink in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
        ] {
            assert!(!script.contains(sink), "{sink} in app.js");
        }
    }

    /// Every code of the map is one that the label can take.
    #[test]
    fn shapes_are_countries() {
        use connmon_core::geo::Country;

        let map = text(Page::new("/metrics"), "/assets/map.svg");
        let codes: Vec<_> = map
            .split("id=\"c-")
            .skip(1)
            .map(|rest| &rest[..2])
            .collect();
        assert_eq!(codes.len(), 235);
        assert!(Page::new("/metrics").asset("/assets/").is_none());
        for code in codes {
            assert!(Country::from_code(code).is_public(), "{code}");
        }
    }
}
