//! What the object says of machines without a card, and of cards that fail. The driver is the stand-in, with orders.

use super::super::{Card, DeviceError, DeviceOptions};
use super::stand_in::{run, stand_in};
use super::{reference, tokens, OBJECT};

/// What opening says, in a process of its own: run by the tests below.
#[test]
#[ignore = "a part of other tests, in a process of its own"]
fn say_what_opening_says() {
    let options = DeviceOptions {
        library: std::env::var_os(OBJECT).map(Into::into),
        ..DeviceOptions::default()
    };
    match Card::open(&options) {
        Ok(card) => println!("opened {}", card.info().words()),
        Err(why) => println!("refused: {why}"),
    }
}

fn said(order: Option<&str>) -> String {
    let output = run("device::tests::faults::say_what_opening_says", order);
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn a_machine_without_a_driver_is_told_so() {
    // This process's loader knows of no stand-in; where there is a driver, there is nothing to see.
    let options = DeviceOptions {
        library: Some(stand_in().object.clone()),
        ..DeviceOptions::default()
    };
    match Card::open(&options) {
        Err(DeviceError::Refused(why)) => {
            assert!(
                why.contains("no NVIDIA driver: libcuda.so.1")
                    || why.contains("built without them"),
                "{why}"
            )
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("an object without kernels was opened"),
    }
}

#[test]
fn cards_that_cannot_serve_say_why() {
    let healthy = said(None);
    assert!(
        healthy.contains("opened stand-in on the processor (generation 9.0, driver 13.0)"),
        "{healthy}"
    );
    for (order, words) in [
        (
            "old",
            "too old: it is of generation 7.5, 8.0 (Ampere) is needed",
        ),
        ("none", "no CUDA-capable device"),
        ("small", "256 MiB are the least"),
        ("alloc=1", "opened"),
    ] {
        let said = said(Some(order));
        assert!(said.contains(words), "{order}: {said}");
    }
}

/// Steps a model until something fails, in a process of its own: run by the tests below.
#[test]
#[ignore = "a part of other tests, in a process of its own"]
fn step_until_it_fails() {
    let options = DeviceOptions {
        library: std::env::var_os(OBJECT).map(Into::into),
        ..DeviceOptions::default()
    };
    let card = Card::open(&options).unwrap();
    let model = reference("llama");
    let first = card.load(&model);
    println!("loading: {:?}", first.as_ref().map(|_| ()));
    let again = || -> Result<(), DeviceError> {
        let on = card.load(&model)?;
        let mut sequence = on.sequence(4, false)?;
        let ids = tokens(&model, 5, 1);
        on.step(&mut [(&mut sequence, &ids)], &[4]).map(|_| ())
    };
    for i in 1..=5 {
        println!("step {i}: {:?}", again());
    }
}

#[test]
fn out_of_memory_fails_a_call_and_a_lost_card_all_of_them() {
    let out = |order| {
        let output = run("device::tests::faults::step_until_it_fails", Some(order));
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    // Loading and a step take some 45 allocations together.
    let text = out("alloc=80");
    assert!(
        text.contains("loading: Ok") && text.contains("step 5: Ok"),
        "{text}"
    );
    assert_eq!(text.matches(": Err(Memory(").count(), 1, "{text}");
    let text = out("launch=40");
    assert!(
        text.contains("loading: Ok") && text.contains("step 1: Ok"),
        "{text}"
    );
    assert!(
        text.contains("Err(Lost(\"starting a kernel")
            && text.contains("step 5: Err(Lost(\"the device failed earlier"),
        "{text}"
    );
}
