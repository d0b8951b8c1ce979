//! The BPF objects of all architectures offer the agent the same: programs,
//! maps, globals.

use std::collections::BTreeMap;

use object::{Object as _, ObjectSection as _, ObjectSymbol as _};

const OBJECTS: [&[u8]; 2] = [
    include_bytes!("../../bpf/connmon-x86_64.o"),
    include_bytes!("../../bpf/connmon-aarch64.o"),
];

type Facts = BTreeMap<String, String>;

/// Programs and the hooks they are for; maps and their shapes.
fn programs_and_maps(bytes: &[u8]) -> (Facts, Facts) {
    let object = aya_obj::Object::parse(bytes).unwrap();
    let programs = object.programs.iter().map(|(name, program)| {
        let hook = format!("{:?} {:?}", program.section, program.license);
        (name.clone(), hook)
    });
    let maps = object.maps.iter().map(|(name, map)| {
        let shape = format!(
            "type {} key {} value {} entries {}",
            map.map_type(),
            map.key_size(),
            map.value_size(),
            map.max_entries()
        );
        (name.clone(), shape)
    });
    (programs.collect(), maps.collect())
}

/// Variables that the agent may set, with section and size.
fn globals(bytes: &[u8]) -> Facts {
    let file = object::File::parse(bytes).unwrap();
    file.symbols()
        .filter(|symbol| symbol.kind() == object::SymbolKind::Data && symbol.is_global())
        .filter_map(|symbol| {
            let section = file.section_by_index(symbol.section_index()?).unwrap();
            let place = format!("{} {}", section.name().unwrap(), symbol.size());
            Some((symbol.name().unwrap().to_owned(), place))
        })
        .filter(|(_, place)| !place.contains("maps"))
        .collect()
}

#[test]
fn every_architecture_has_the_same_programs_maps_and_globals() {
    let [x86_64, aarch64] = OBJECTS;
    assert_ne!(x86_64, aarch64, "one object under two names");
    let (programs, maps) = programs_and_maps(x86_64);
    assert_eq!(programs_and_maps(aarch64), (programs.clone(), maps.clone()));
    assert_eq!(globals(aarch64), globals(x86_64));
    // What the agent asks for is among them.
    for name in [
        "state_tp_btf",
        "state_nested",
        "state_tp",
        "state_lost",
        "connect_fentry",
        "accept_kret",
    ] {
        assert!(programs.contains_key(name), "{name}: {programs:?}");
    }
    for name in ["EVENTS", "COUNTERS", "BATCH"] {
        assert!(maps.contains_key(name), "{name}: {maps:?}");
    }
    let globals = globals(x86_64);
    for name in ["OFFSETS", "DROP_LOOPBACK"] {
        assert!(globals.contains_key(name), "{name}: {globals:?}");
    }
}
