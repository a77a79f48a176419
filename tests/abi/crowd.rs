//! A host that is full of other things.

use super::{library, Bench};

#[test]
fn a_host_with_its_own_lua_sqlite_and_signals_is_left_as_it_was_and_the_library_stays_mapped() {
    let bench = Bench::new();
    let exe = bench.build("cc", "-std=c99", "tests/abi/crowd.c", false);
    let said = bench.run(&exe, &[library(), bench.path("store")]);
    assert!(said.ends_with("done\n"), "{said}");
    for neighbour in ["lua", "sqlite"] {
        for when in ["before", "after"] {
            let used = said.contains(&format!("\n{neighbour} {when}\n"))
                || said.starts_with(&format!("{neighbour} {when}\n"));
            let skipped = said.contains(&format!("skipped {neighbour} {when}\n"));
            assert!(used || skipped, "{said}");
            if skipped {
                println!("{neighbour} is not on this machine; that part was skipped");
            }
        }
    }
}

/// The example itself, compiled into the tests, so that it is built and run with them.
#[path = "../../host-examples/rust/main.rs"]
#[allow(dead_code)]
mod rust_host;

#[test]
fn a_rust_host_loads_the_library_and_plays_an_episode() {
    let bench = Bench::new();
    let played = rust_host::play(
        library().to_str().unwrap(),
        bench.path("store").to_str().unwrap(),
    );
    assert_eq!(played.unwrap(), "teacher");
}
