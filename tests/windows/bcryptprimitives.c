/* What Wine 8 lacks of Windows: the function that Rust's standard library takes random bytes from. It stands beside the test hosts under
 * Wine and nowhere else; Windows has its own.
 *
 *     x86_64-w64-mingw32-gcc -shared -o bcryptprimitives.dll bcryptprimitives.c -ladvapi32
 */
#include <windows.h>
#include <ntsecapi.h>

__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE data, SIZE_T length) { return RtlGenRandom(data, (ULONG)length); }
