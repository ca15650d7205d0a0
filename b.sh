F="-std=c++20 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi -I${1:-/work/main/csrc} -DFUSED_RNN_X86 -mavx2 -mfma -mf16c"
g++ $F pk.cpp -o pk${2} && /tmp/me/quiet.sh ./pk${2}
