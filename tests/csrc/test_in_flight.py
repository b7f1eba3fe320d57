from scripts.cuda_in_flight import loads_in_flight, resident_threads


def listing(*instructions):
    return "\n".join(f"        /*{16 * i:04x}*/   {text} ;" for i, text in enumerate(instructions))


LOADS = (
    "LDG.E.128 R8, desc[UR12][R4.64]",
    "@!P1 LDG.E.64 R12, desc[UR12][R6.64+0x10]",
    "LDG.E.U16 R20, desc[UR12][R2.64]",
)


def test_loads_count_until_one_of_their_registers_is_named():
    assert loads_in_flight(listing(*LOADS, "FADD R0, R8, R9")) == 26
    # The second register of a load of 16 bytes, the store of four, an overwritten one: each waits for the load.
    for waits in ("FADD R0, R11, R1", "STG.E.128 desc[UR12][R30.64], R8", "MOV R9, RZ", "IADD3 R0, R8, R1, RZ"):
        assert loads_in_flight(listing(LOADS[0], waits, *LOADS[1:])) == 16
    # Other registers, the address of a load and uniform ones do not.
    for free in ("FADD R0, R12, R1", "STG.E desc[UR8][R4.64], R5", "UIADD3 UR8, UR9, UR10, URZ"):
        assert loads_in_flight(listing(LOADS[0], free, LOADS[2])) == 18


def test_a_load_brings_those_before_it():
    assert loads_in_flight(listing(*LOADS[:2], "FADD R0, R12, R1", LOADS[2])) == 24
    assert loads_in_flight(listing(LOADS[1], LOADS[0], "FADD R0, R9, R1", *[LOADS[2]] * 2)) == 24


def test_an_address_that_is_loaded_is_waited_for():
    assert loads_in_flight(listing("LDG.E.64 R4, desc[UR12][R2.64]", LOADS[0])) == 16


def test_resident_threads():
    assert resident_threads(32, 0, 256) == 2048
    assert resident_threads(33, 0, 256) == 1536  # 40 registers a thread
    assert resident_threads(128, 256, 512) == 512
    assert resident_threads(32, 80 * 1024, 128) == 256
