#define FUSED_RNN_ISA avx2
#include "cpu/pack.h"
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <algorithm>
#include <vector>
#include <cstring>
using namespace fused_rnn; using namespace fused_rnn::cpu::avx2;
int main(){
  for (int gates : {4,3}) for (int64_t H : {64,128,150,256,512,1024}) {
    int64_t K=H, Hp=(H+15)/16*16; 
    float* w=(float*)aligned_alloc(64,(gates*H*K*4+63)/64*64+64); float* d=(float*)aligned_alloc(64,gates*Hp*K*4+4096);
    for(int64_t i=0;i<gates*H*K;i++) w[i]=i%97*0.1f; memset(d,0,gates*Hp*K*4);
    std::vector<double> t,c;
    for(int rep=0;rep<60;rep++){ auto a=std::chrono::steady_clock::now();
      for_panels<float>(gates,0,Hp,[&](int64_t unit,int vectors){ pack_transposed<float>(w,gates,H,K,unit,vectors,d+unit*gates*packed_rows<float>(K)); });
      auto b=std::chrono::steady_clock::now(); t.push_back(std::chrono::duration<double>(b-a).count());
    }
    double s=0; for(int64_t i=0;i<gates*Hp*K;i++) s+=d[i]*(i%13);
    for(int rep=0;rep<60;rep++){ auto a=std::chrono::steady_clock::now(); memcpy(d,w,gates*H*K*4); asm volatile(""::"r"(d):"memory");
      auto b=std::chrono::steady_clock::now(); c.push_back(std::chrono::duration<double>(b-a).count()); }
    std::sort(t.begin(),t.end()); std::sort(c.begin(),c.end());
    printf("G%d H%4ld: pack %.1f us (min %.1f) %.1f GB/s   memcpy %.1f us %.1f GB/s  sum %.6g\n",gates,H,t[30]*1e6,t[0]*1e6,gates*H*K*4/t[0]*1e-9,c[30]*1e6,gates*H*K*4/c[0]*1e-9,s);
  }
}
