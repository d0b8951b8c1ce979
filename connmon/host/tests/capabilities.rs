//! Which feature needs which capability: the tables of the documents equal the
//! one that `connmon check` uses.

use std::fs;
use std::path::Path;

use connmon_host::sandbox::{self, Feature};

/// Cells of the table in a document whose head starts so, without backticks.
fn rows(document: &str, head: &str) -> Vec<Vec<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(document);
    let text = fs::read_to_string(path).unwrap();
    let table = text.lines().skip_while(|line| !line.starts_with(head));
    let rows = table.skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let row = row.replace('`', "");
        let cells = row.trim_matches('|').split('|');
        cells.map(|cell| cell.trim().to_owned()).collect()
    })
    .collect()
}

/// In any order.
fn needs(feature: &Feature) -> Vec<String> {
    let mut names: Vec<_> = feature.needs.iter().map(sandbox::names).collect();
    names.sort();
    names
}

fn named(cell: &str) -> Vec<String> {
    let mut names: Vec<_> = cell.split(", ").map(str::to_owned).collect();
    names.sort();
    names
}

#[test]
fn the_documents_have_every_feature_in_its_words() {
    for (document, head) in [
        ("README.md", "| feature | capabilities | without them |"),
        (
            "docs/capabilities.md",
            "| feature | capabilities | kept while running | without them |",
        ),
    ] {
        let rows = rows(document, head);
        let features = sandbox::FEATURES;
        assert_eq!(rows.len(), features.len(), "{document}: {rows:#?}");
        for (row, feature) in rows.iter().zip(features) {
            assert_eq!(row[0], feature.name, "{document}");
            assert_eq!(named(&row[1]), needs(feature), "{document}: {}", row[0]);
            assert_eq!(
                row.last().unwrap(),
                feature.without,
                "{document}: {}",
                row[0]
            );
            if let [_, _, kept, _] = &row[..] {
                assert_eq!(
                    kept.starts_with("no"),
                    feature.dropped_after_attach,
                    "{document}: {}: {kept}",
                    row[0]
                );
            }
        }
    }
}
