/* Makes the calls of packed corpora (tests/fuzz/abi.c): STORE MODEL PACKED... */
#include "../fuzz/abi.c"

int main(int argc, char **argv) {
  int file;
  size_t inputs = 0;
  if (argc < 4) return 2;
  locum_fuzz_begin(argv[1], argv[2]);
  for (file = 3; file < argc; file++) {
    FILE *packed = fopen(argv[file], "rb");
    uint8_t length[4];
    MUST(packed != NULL);
    /* Before each input its length, the lowest byte first. */
    while (fread(length, 1, sizeof length, packed) == sizeof length) {
      const size_t size = length[0] | (size_t)length[1] << 8 | (size_t)length[2] << 16 | (size_t)length[3] << 24;
      uint8_t *data = malloc(size + 1);
      MUST(data != NULL && fread(data, 1, size, packed) == size);
      locum_fuzz_abi(data, size);
      free(data);
      inputs++;
    }
    (void)fclose(packed);
  }
  MUST(told(locum_close(store, 0, &error)) == LOCUM_OK);
  MUST(inputs > 0);
  printf("done\n");
  return 0;
}
